"""`python -m moiety`: what launchers such as `accelerate launch -m moiety ...` start."""

from moiety.cli import main

main()
