"""Headers and options to steps, tasks and files. Reads no payload but to compare, writes nothing;
every refusal is raised here."""
