# /// script
# requires-python = ">=3.11"
# dependencies = ["adapterkit"]
# ///
"""A merge from Hub to Hub as a job of Hugging Face: nothing is stored on this machine.

hf jobs uv run --secrets HF_TOKEN --timeout 2h merge.py org/base org/adapter me/merged
"""

import sys

import adapterkit

base, *adapters, target = sys.argv[1:]
receipt = adapterkit.merge(base, adapters, out=f"hf://{target}", disk_limit="20GB")
print(receipt.data["pushed"]["url"])
