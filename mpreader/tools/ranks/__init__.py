"""Loads by several ranks of this machine, as a job's ranks make them: a check of a set-up, and of what sharing saves.

``mpreader load --ranks`` and the demo use :mod:`~mpreader.tools.ranks.job`. A process that has imported torch once is
forked for each rank::

    job.py  ── starts ──>  launcher.py  ── forks ──>  rank.py, once for each rank
       └──────────── messages, over a socket for each ───────┘

No launcher of jobs, port or file is needed, and nothing is left if any of the processes is killed.
"""
