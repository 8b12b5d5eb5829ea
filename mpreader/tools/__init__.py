"""What the commands do, apart from the command line itself. The library never imports it."""
