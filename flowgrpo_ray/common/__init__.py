"""The words that all wings share: what travels between processes, errors, paths, image files.

What enters here is needed by at least two wings and knows none of them. Loads NumPy, no more.
"""
