"""The protocol on Twisted: links, streams, bridges and the sockets beside them."""
