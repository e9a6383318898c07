"""Plug-ins for other programs: each file is imported by the program that it is named after."""
