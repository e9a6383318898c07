"""What is computed: edits of rows, and tasks, each one output computed whole: a frozen record that
pickles."""
