"""The neutral form of an adapter's modules, and what changes between formats."""
