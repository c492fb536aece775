// NOT COVERED BY TESTS: written against the documented API of EF Core 8 and Npgsql 8.
// A producer: the event exists exactly when the transaction commits.

using System.ComponentModel.DataAnnotations.Schema;
using System.Text.Json;
using Microsoft.EntityFrameworkCore;

await using var shop = new Shop();
await PayAsync(shop, 7);

static async Task PayAsync(Shop shop, long id)
{
    // With EnableRetryOnFailure, put all of this into shop.Database.CreateExecutionStrategy().
    await using var transaction = await shop.Database.BeginTransactionAsync();
    var order = await shop.Orders.SingleAsync(o => o.Id == id);
    order.State = "paid";
    // The change comes first: by its row lock, events of an order come in the order of commits.
    await shop.SaveChangesAsync();
    var payload = JsonSerializer.Serialize(new { id, state = order.State });
    // Each {…} is sent as a parameter: bigint and text.
    await shop.Database.ExecuteSqlAsync($"SELECT watership.emit('order', {id}, 'paid', {payload})");
    await transaction.CommitAsync();
}

[Table("orders")]
public sealed class Order
{
    [Column("id")]
    public long Id { get; set; }

    [Column("state")]
    public string State { get; set; } = "";
}

public sealed class Shop : DbContext
{
    public DbSet<Order> Orders => Set<Order>();

    // Npgsql takes no URL: "Host=…;Username=…;Password=…;Database=…"
    protected override void OnConfiguring(DbContextOptionsBuilder options) =>
        options.UseNpgsql(Environment.GetEnvironmentVariable("DATABASE"));
}
