"""One file per verb: `plan_<verb>` decides everything from headers, the verb runs the plan."""
