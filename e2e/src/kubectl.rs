//! kubectl, as the demo and the tests use it.
