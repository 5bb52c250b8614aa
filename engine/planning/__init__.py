"""What a model would take on an accelerator, and how fast it would be: the cost model behind `longshadow plan`.

Predictions from bytes, operations and published ceilings: nothing here runs a model, and nothing needs torch.
"""
