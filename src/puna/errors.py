"""The one exception class for mistakes a user can mend.

A `PunaError` carries one line: what was wrong and what to do about it. The command line prints that line and exits 1;
the server answers 400 with it. Anything else that is raised is a bug in puna and keeps its traceback.
"""


class PunaError(ValueError):
    """A user's mistake (bad file, unknown name, impossible setting), told in one line with the way out."""
