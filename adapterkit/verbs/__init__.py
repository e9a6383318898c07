"""One file per verb: check the options, plan, run. No verb imports another."""
