"""Help for tests of DataFlex and of components written for it: tiny models built in code, two processes on one CPU."""
