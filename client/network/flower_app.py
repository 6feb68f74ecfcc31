"""The site behind Flower: a client app that only hands each message's bytes to the local site."""

from collections.abc import Callable

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from offsite.client.site.round_handler import Site, answer
from offsite.protos.flower import NAME_STAGE, pack, unpack


def client_app(site_of: Callable[[Context], Site]) -> ClientApp:
    """Returns a client app that runs the locally installed code.

    Args:
      site_of: function from a Flower context to its site; the function must keep sites alive between messages, since a
        round's keys live in the site.
    """
    app = ClientApp()

    @app.train()
    def on_message(message: Message, context: Context) -> Message:
        site = site_of(context)
        stage, body = unpack(message.content)
        reply = site.name.encode() if stage == NAME_STAGE else answer(site, stage, body)
        return Message(content=pack(stage, reply), reply_to=message)

    return app
