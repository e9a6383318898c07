"""The neutral form of an adapter's modules, and the steps that differ between formats."""
