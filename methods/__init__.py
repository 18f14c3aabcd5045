"""Context-parallel methods, one file each; the file name is the method's name.

The top-level name is generic on purpose: the import path equals the file path in a checkout, an editable install and
a wheel, so spawned ranks import a method by the same name everywhere.  Files import `cpbench.method`,
`cpbench.errors` and `cpbench.runtime.*`, and never one another; only `cpbench.registry` names this package.
"""
