module nodeproxy.invalid/pause

go 1.24
