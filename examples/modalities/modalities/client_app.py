"""modalities: a client of FedAvg, which shares the trunk and keeps its encoder and its head."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from modalities.task import Net, load_data, modality_of, pretrained
from modalities.task import test as test_net
from modalities.task import train as train_net

app = ClientApp()
OWN = "own"


def received(message: Message, context: Context) -> Net:
    """The server's trunk between the client's own encoder and head, as the last round left these."""
    net = Net(modality_of(context.node_config["partition-id"]), pretrained(context.run_config["checkpoint"]))
    if OWN in context.state:
        net.load_state_dict(context.state[OWN].to_torch_state_dict(), strict=False)
    net.trunk.load_state_dict(message.content["arrays"].to_torch_state_dict())
    return net


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round."""
    node, run = context.node_config, context.run_config
    net = received(message, context)
    loader, _ = load_data(node["partition-id"], node["num-partitions"], run["batch-size"])
    loss = train_net(net, loader, run["local-epochs"], message.content["config"]["lr"])
    own = {name: value for name, value in net.state_dict().items() if not name.startswith("trunk.")}
    context.state[OWN] = ArrayRecord(own)
    metrics = MetricRecord({"train_loss": loss, "num-examples": len(loader.dataset)})
    return Message(RecordDict({"arrays": ArrayRecord(net.trunk.state_dict()), "metrics": metrics}), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Tests the server's trunk, with the client's own encoder and head, on the client's data."""
    node, run = context.node_config, context.run_config
    net = received(message, context)
    _, loader = load_data(node["partition-id"], node["num-partitions"], run["batch-size"])
    metrics = MetricRecord(
        dict(zip(("loss", "accuracy"), test_net(net, loader), strict=True)) | {"num-examples": len(loader.dataset)}
    )
    return Message(RecordDict({"metrics": metrics}), reply_to=message)
