"""What a user did wrong, in one line that names the thing and the remedy."""


class UserError(Exception):
  """A mistake that the user can mend: launchers print it and exit with 2.

  The message is one line. It names the file or key at fault, then what to do.
  """
