"""An adapter in the layout of one tool to the plan of its conversion into that of another."""
