"""A reward as a Ray Serve application: deployed, scaled, called, and watched.

``service`` is the deployment, ``http`` its door for others, ``client`` the way in for a run,
``deploy`` and ``admin`` bring it up. Here stand all uses of Ray that `cluster` shares: the table of
metrics, and what is private in Ray. Each process imports only the files that it runs.
"""
