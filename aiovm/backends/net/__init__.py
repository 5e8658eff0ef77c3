"""A network in user mode: Ethernet, ARP, DHCP, DNS and TCP between a guest's card and the embedding program."""
