"""Options of gRPC that both ends of the depot share."""

# No message is inflated: a compressed one is refused, and would be handed on as it came if it were not. Older gRPC
# inflates before it compares the size with its limit.
UNCOMPRESSED = (("grpc.compression_enabled_algorithms_bitset", 1), ("grpc.per_message_decompression", 0))
