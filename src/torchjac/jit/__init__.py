"""The just-in-time compiler chooses the code that answers a call, and compiles when it pays."""
