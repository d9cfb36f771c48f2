"""How loaded will decoding be when a prefill that starts now has ended?"""

from __future__ import annotations

from collections.abc import Callable, Collection

from reference_cluster.cost_model import CostModel
from reference_cluster.policies.view import ClusterView
from reference_cluster.request import Request

DecodeTime = Callable[[Request], float]  # Predicted seconds of one request's decode.


def prefilled_at(request: Request, now_s: float) -> float:
    """When a request's prefill has ended, or is predicted to (never before now if it has not)."""
    stamps = request.timeline
    if stamps.transferred_s is not None:
        return stamps.transferred_s
    assert stamps.placed_s is not None
    assert request.predicted_ttft_s is not None
    return max(now_s, stamps.placed_s + request.predicted_ttft_s)


def decoding_at(
    requests: Collection[Request], at_s: float, now_s: float, decode_s: DecodeTime
) -> list[Request]:
    """The requests that will be decoding at `at_s`: their prefill is done by then and their decode,
    which lasts `decode_s`, is not (Mooncake, arXiv 2407.00079, section 7.4)."""
    found = []
    for request in requests:
        if request.output_tokens > 1:
            begin_s = prefilled_at(request, now_s)
            if begin_s <= at_s < begin_s + decode_s(request):
                found.append(request)
    return found


def predicted_tbt_s(
    request: Request, view: ClusterView, cost: CostModel, at_s: float, decode_s: DecodeTime
) -> float:
    """Step time of a decode instance at `at_s` if `request` joins it then.

    System-level: whoever decodes by then is taken to be spread evenly over the instances. Where
    each was placed says less, as by then others will have gone there to even it out.
    """
    decoding = decoding_at(view.in_flight, at_s, view.now_s, decode_s)
    context_tokens = sum(one.input_tokens for one in decoding)
    idle_s = cost.step_s(0, 0)
    others_s = (cost.step_s(len(decoding), context_tokens) - idle_s) / len(view.decode)
    return others_s + cost.step_s(1, request.input_tokens)
