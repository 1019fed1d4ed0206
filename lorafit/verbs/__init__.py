"""The verbs of the command line, one file each: `add` declares the arguments, `run` calls the library and prints.

Nothing here is imported before its verb is called except the declarations, so that `lorafit --help` is instant: heavy
imports belong inside `run`.
"""
