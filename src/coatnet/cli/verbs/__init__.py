"""The verbs of the command line: each reads its arguments, calls the package, prints and gives its exit code.

Only what a verb needs is imported, when it runs.
"""
