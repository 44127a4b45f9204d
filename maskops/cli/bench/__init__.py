"""`python -m maskops bench`: what padding costs on real text, and what is left of it.

One engine. `corpus` reads documents, `batches` lays them out, `variants` is the one list of ways to compute attention
and loss over them, `jobs` turns a variant into something that can be timed and checked, `timing` times it, `report`
and `chart` show it. `command` puts them together. `compilation` is `bench compile`.
"""
