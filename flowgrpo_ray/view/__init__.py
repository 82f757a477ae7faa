"""What a person sees: the console, the live page and its server, the report.

Reads run folders and shows them; decides nothing and changes nothing. The page's own files stand
in ``assets/`` and are the same for the server and for a report.
"""
