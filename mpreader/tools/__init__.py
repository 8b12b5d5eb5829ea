"""Tools: downloads, benchmarks, the doctor and the demo, each as functions that return results and print nothing.

The command line (:mod:`mpreader.cli`) calls them. Nothing else of the library may import them.
"""
