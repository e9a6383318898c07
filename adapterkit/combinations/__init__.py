"""Ways to make one delta of several: one method, one file, one frozen record whose fields are its options."""
