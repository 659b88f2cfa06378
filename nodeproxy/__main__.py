from nodeproxy.cli.main import main

main()
