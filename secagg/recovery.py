"""Mask keys from the shares that survivors released; Bonawitz et al. 2017, figure 4, round 4."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from offsite.errors import ProtocolViolation
from offsite.secagg import agreement, shamir
from offsite.secagg.agreement import Agreed
from offsite.secagg.params import SecAggParams

Released = Mapping[str, Mapping[str, tuple[bytes, int]]]


@dataclass
class Recovery:
    """Reconstructs secrets and compares each with its site's announcement.

    Attributes:
      terms: public terms of the round.
      agreed: T1 and the keys of U1.
      released: kind and share by responder and site; at least `threshold` responders.
      faulty: responders whose share did not fit; filled while reconstructing.
    """

    terms: SecAggParams
    agreed: Agreed
    released: Released
    faulty: set[str] = field(default_factory=set)

    def self_mask(self, site: str) -> bytes:
        """Returns the self-mask key of a survivor.

        Raises:
          ProtocolViolation: the seed does not match H(b).
        """
        commitment = self.agreed.keys[site].commitment
        seed = self._secret(site, lambda seed: agreement.commit(self.terms, site, seed) == commitment)
        return agreement.self_key(seed, self.agreed.transcript, site)

    def pair_masks(self, site: str, peers: list[str]) -> dict[str, bytes]:
        """Returns the pair-mask keys of a dropped site with its peers.

        Raises:
          ProtocolViolation: the reconstructed key does not match the announced key.
        """
        keys = self.agreed.keys
        # X25519 ignores some bits of a scalar, so the public key alone would let a share that is slightly off pass.
        scalar = self._secret(
            site, lambda scalar: agreement.clamp(scalar) == scalar and agreement.public_of(scalar) == keys[site].mask
        )
        private = agreement.private_of(scalar)
        return {
            peer: agreement.pair_key(
                agreement.exchange(private, keys[peer].mask, peer=peer), self.agreed.transcript, site, peer
            )
            for peer in peers
        }

    def _secret(self, site: str, announced: Callable[[int], bool]) -> int:
        """Returns the secret from the first shares that give the announced value, without one responder if needed."""
        threshold, places = self.terms.threshold, self.terms.sites
        answers = sorted(self.released, key=lambda sender: (sender in self.faulty, sender))
        spare = answers[:threshold] if len(answers) > threshold else []
        for left_out in (None, *spare):
            chosen = [sender for sender in answers if sender != left_out][:threshold]
            shares = {places.index(sender) + 1: self.released[sender][site][1] for sender in chosen}
            secret = shamir.combine(shares, threshold=threshold)
            if announced(secret):
                if left_out is not None:
                    self.faulty.add(left_out)
                return secret
        raise ProtocolViolation(
            f"site={site!r}: the secret from {len(answers)} answers is not the announced secret; a share is wrong; "
            "wait for more answers or repeat the round"
        )
