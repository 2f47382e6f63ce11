"""The seven experiments of flamingo_optimization.py, one module each.

Each has `run(lab) -> dict`, everything measured as plain numbers and names, and `show(result) -> str`, its tables. The
result's "points" are what the summary and the plot compare: see `lab.point`.
"""
