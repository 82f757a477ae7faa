"""A run on Ray: the driver's loop, the actors that it drives, and how they come and go.

``driver`` is the loop, ``crew`` its actors, ``stream`` the units on their way. Ray everywhere,
torch only inside actors. Each process imports only the files that it runs, so nothing is
handed on here.
"""
