"""Who is who: identities, certificates, sealed boxes, hash chains and the federation that every owner signed."""
