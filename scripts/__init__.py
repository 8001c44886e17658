import utils  # noqa: F401  before the libraries, whose messages it quiets
