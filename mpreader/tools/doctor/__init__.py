"""Doctor of the command ``doctor``: finds faults in a host's set-up and in its access to S3, and names the remedies.

It changes nothing, and no finding shows a secret.
"""
