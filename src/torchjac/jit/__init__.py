"""The just-in-time compiler: which code answers a call, and when better code is made."""
