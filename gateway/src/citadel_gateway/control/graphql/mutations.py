"""What can be done. Each step is the one that REST takes, with the same rights and the same audit log."""

import strawberry

from citadel_gateway.control import changes, people
from citadel_gateway.control import feedback as opinions
from citadel_gateway.control.admin import NewKey
from citadel_gateway.control.graphql import chat
from citadel_gateway.control.graphql.context import Info
from citadel_gateway.control.graphql.fields import mutation
from citadel_gateway.control.graphql.inputs import ChatInput, FeedbackInput, KeyInput, ModelState
from citadel_gateway.control.graphql.queries import visible_models
from citadel_gateway.control.graphql.types import ChatCompletion, CreatedKey, Feedback, KeyEntry, Model
from citadel_gateway.errors import Refusal


@strawberry.type
class Mutation:
    @mutation("Ask a model and wait for the whole answer; limits and cost are those of HTTP.")
    async def chat_completion(self, info: Info, input: ChatInput) -> ChatCompletion:  # noqa: A002  # the argument's name
        info.context.need("inference")
        return await chat.complete(info.context, input)

    @mutation("Say what an answer was like; sent again, it corrects what was said.")
    async def feedback(self, info: Info, input: FeedbackInput) -> Feedback:  # noqa: A002  # the argument's name
        info.context.need("inference", "admin")
        given = opinions.Given(**{name: getattr(input, name) for name in opinions.Given.model_fields})
        found = await opinions.take(info.context.state, info.context.key, given, "graphql")
        if found is None:
            raise Refusal(404, "not_found", "There is no such request of yours")
        return Feedback.of(found)

    @mutation("Drain a model or let it serve again, on all hosts; scope admin.")
    async def set_model_state(self, info: Info, name: str, state: ModelState) -> Model:
        info.context.need("admin")
        context, actor = info.context, info.context.actor
        model = context.state.find(name)
        if model is None:
            raise Refusal(404, "model_not_found", f"The model {name[:128]!r} does not exist")
        step = changes.drain if state is ModelState.DRAINED else changes.resume
        draining = await context.in_thread(lambda: step(context.state, actor, model))
        found = next(one for one in visible_models(context) if one.name == model)
        found.state = "draining" if draining else found.state if found.state != "draining" else "unknown"
        return found

    @mutation("Make a key; it is shown this once. Scope admin.")
    async def create_key(self, info: Info, input: KeyInput) -> CreatedKey:  # noqa: A002  # the argument's name
        info.context.need("admin")
        context, actor = info.context, info.context.actor
        given = {name: value for name in NewKey.model_fields if (value := getattr(input, name, None)) is not None}
        new = NewKey(**given)
        row, token = await context.in_thread(
            lambda: people.create_key(
                context.state,
                actor,
                new.user,
                name=new.id or "",
                scopes=new.scopes,
                models=new.models,
                expires_in=new.expires_in,
                use_case=new.use_case,
                new_user=new.new_user,
            )
        )
        return CreatedKey(key=token, entry=KeyEntry.of(row))

    @mutation("Revoke a key for ever; one of the files is disabled. Scope admin.")
    async def revoke_key(self, info: Info, id: str) -> KeyEntry:  # noqa: A002  # the argument's name
        info.context.need("admin")
        context, actor = info.context, info.context.actor
        return KeyEntry.of(await context.in_thread(lambda: people.revoke_key(context.state, actor, id)))
