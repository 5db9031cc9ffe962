"""The finished run of tiny models that the tests of learning use, for the command line too."""

from tests.ops.conftest import learned as learned
