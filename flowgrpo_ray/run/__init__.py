"""What a run leaves behind and says of itself: its folder, checkpoints, rows, ledger, alarms.

Everything that reads or writes a run folder, and everything that makes numbers of a run out of
what was measured. Knows no Ray: it works on folders of runs that ended long ago as well.
"""
