"""What the operators are measured on: one module per operator, with its shapes, bytes and operations.

A module `<op>` has `cases()`, the shapes it is measured at, and `make(case, device, seed)`, its `Work` on random
contents: factors and slots need not come from a model to take as long.
"""
