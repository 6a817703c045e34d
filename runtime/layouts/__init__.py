"""Layouts of weights by name: which program reads them, and the steps that lead to them."""
