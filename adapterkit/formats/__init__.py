"""Adapters in other layouts than PEFT's: formats described in TOML files, and their interpreter.

A file is read into `Contents`, and these are written as another file:

  detect, containers, pickles       which format a source is in, and its stored tensors
  read: keys, names, fusing         keys -> modules of the model, each part an expression
  record, kinds, parts, tensors     what lies between: modules, kinds of deltas, expressions
  write: capabilities, fusing       the modules that a format holds -> keys
  schema, library                   the words of the TOML files; configs, templates, scales, steps
                                    and rows are the interpreter of some of them
  experts, stacked_experts          stacks and single experts, and those that are one tensor
  grouped, biases, widened          loralib's fused layers; trained biases; layers with more inputs
  same_delta, deltas, fitted        another scale or rank; a delta's value; plain factors of it
  adapter_layout, adapter_kinds, adapter_experts, adapter_dialects
                                    PEFT's layout, read and written by the package `adapters`
"""
