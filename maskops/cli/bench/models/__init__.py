"""`python -m maskops bench text --model`: padding in models that people use, on their own tokenizers.

`sources` finds weights and checks what they are, `ways` is the list of ways to run a model over a batch, `work` runs
them and takes their results, `memory` and `parts` see what they take, `measure` times and compares, `report` and
`chart` show it, `command` puts them together. `training` is `bench train`: the loss of a small model over time.

transformers is imported by what needs it, never at import.
"""
