"""The Hub: the only package that talks to the network, through huggingface_hub, which is imported
on first use."""
