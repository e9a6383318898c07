"""What the read-only verbs measure, as plain dicts, and how it is shown."""
