"""Computations that kernels are held against one another on: inputs, useful work, and the formulas in float64.

`contest` says what a contest is, the others hold them. Who takes part is written where they are run: in `gpu` and in
`cpu`.
"""
