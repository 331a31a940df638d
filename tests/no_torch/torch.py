"""Commands of tests find this in the place of torch: nothing in the package needs it."""

raise ImportError("torch is for references of tests only")
