"""How many sites may help a cheating coordinator, and the smallest sum that keeps the other sites' updates apart.

Accomplices are counted against all members and not against the invited sites, because the coordinator picks who is
invited. docs/secure-aggregation.md has the proof.
"""

MIN_SITES = 3  # with two sites each learns the other's update from the sum
_HONEST = 2  # the sum of one honest update and known updates is that one update


def usual_accomplices(members: int) -> int:
    """Returns floor(N / 3), the number of helpers that N members withstand unless their owners sign another."""
    return members // 3


def fewest_in_sum(accomplices: int) -> int:
    """Returns the smallest n_min with which each sum holds the updates of two sites that do not help."""
    return max(MIN_SITES, accomplices + _HONEST)


def weaker_sentence(accomplices: int, members: int) -> str:
    """Returns the sentence that every owner signs where fewer helpers than usual are withstood; empty elsewhere."""
    usual = usual_accomplices(members)
    if accomplices >= usual:
        return ""
    return (
        f"WEAKER THAN USUAL: the coordinator cannot read the update of a single site only while at most {accomplices} "
        f"of the {members} sites help it; usual is a third, which is {usual}. With more helpers it may read the noised "
        "update of a site that does not help."
    )
