from mball.server.cli import main

main()
